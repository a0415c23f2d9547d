"""The engine that export_model.py writes as TorchScript: ``decoder`` is its face."""
