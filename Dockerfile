# syntax=docker/dockerfile:1
# Both stages use the same base image, because the virtual environment of the first is copied to the second. Any image
# with Python 3.11 or later will do.
ARG BASE=python:3.13-slim-bookworm

FROM ${BASE} AS build
WORKDIR /src
# Dependencies have a layer of their own, which is reused when only the program changes. run.txt pins versions and
# hashes.
COPY requirements/run.txt ./
RUN python3 -m venv /opt/sseproxy \
    && /opt/sseproxy/bin/pip install --no-cache-dir --disable-pip-version-check --require-hashes --requirement run.txt
COPY pyproject.toml README.md LICENSE ./
COPY sseproxy ./sseproxy
RUN /opt/sseproxy/bin/pip install --no-cache-dir --disable-pip-version-check --no-deps .

FROM ${BASE}
LABEL org.opencontainers.image.title="sseproxy" \
      org.opencontainers.image.description="A reverse proxy for OpenAI-compatible APIs: it forwards streams immediately and unchanged, and measures them" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/sseproxy /opt/sseproxy
# Log lines appear immediately. No .pyc files are written, because the file system may be read-only.
ENV PATH=/opt/sseproxy/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
# A number and not a name, so that Kubernetes can check that it is not root (runAsNonRoot).
USER 65532:65532
EXPOSE 8080 9464
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=15s CMD ["sseproxy", "healthcheck"]
ENTRYPOINT ["sseproxy"]
# In this file, set listen: 0.0.0.0:8080 and admin.listen: 0.0.0.0:9464. Loopback cannot be reached from outside.
CMD ["serve", "-c", "/etc/sseproxy/sseproxy.yaml"]
