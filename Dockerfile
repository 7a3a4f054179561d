# syntax=docker/dockerfile:1
# Any image with Python 3.11 or later, of which both stages are made: the environment is moved from one to the other.
ARG BASE=python:3.13-slim-bookworm

FROM ${BASE} AS build
WORKDIR /src
# The versions and hashes that were tested, in a layer that stays as it is where only the program changes.
COPY requirements/run.txt ./
RUN python3 -m venv /opt/sseproxy \
    && /opt/sseproxy/bin/pip install --no-cache-dir --disable-pip-version-check --require-hashes --requirement run.txt
COPY pyproject.toml README.md LICENSE ./
COPY sseproxy ./sseproxy
RUN /opt/sseproxy/bin/pip install --no-cache-dir --disable-pip-version-check --no-deps .

FROM ${BASE}
LABEL org.opencontainers.image.title="sseproxy" \
      org.opencontainers.image.description="A reverse proxy for OpenAI-compatible APIs that makes streaming visible and lossless" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/sseproxy /opt/sseproxy
# Logs appear when they are written, and nothing is written into a file system that may be read-only.
ENV PATH=/opt/sseproxy/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
# A number, so that Kubernetes can see that it is not root's.
USER 65532:65532
EXPOSE 8080 9464
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=15s CMD ["sseproxy", "healthcheck"]
ENTRYPOINT ["sseproxy"]
# In it, listen on 0.0.0.0:8080, and admin.listen on 0.0.0.0:9464.
CMD ["serve", "-c", "/etc/sseproxy/sseproxy.yaml"]
