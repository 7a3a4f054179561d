# syntax=docker/dockerfile:1
ARG BASE=python:3.13-slim-bookworm

FROM ${BASE} AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY sseproxy ./sseproxy
RUN python -m venv /opt/sseproxy && /opt/sseproxy/bin/pip install --no-cache-dir --no-compile .

FROM ${BASE}
LABEL org.opencontainers.image.title="sseproxy" \
      org.opencontainers.image.description="A reverse proxy for OpenAI-compatible APIs that makes streaming visible and lossless" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/sseproxy /opt/sseproxy
ENV PATH=/opt/sseproxy/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1
# Nobody's numbers: runAsNonRoot wants a number, and nothing is written to disk.
USER 65532:65532
EXPOSE 8080 9464
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=5s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9464/livez', timeout=2)"]
ENTRYPOINT ["sseproxy"]
CMD ["serve", "-c", "/etc/sseproxy/sseproxy.yaml"]
