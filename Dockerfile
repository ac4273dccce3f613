# docker build -t omnimamba . && docker run --rm -p 8000:8000 omnimamba
FROM python:3.11-slim

WORKDIR /src
COPY pyproject.toml requirements.lock README.md LICENSE ./
COPY src src
# the lock as constraints: its versions, without the tools of development
RUN pip install --no-cache-dir --constraint requirements.lock '.[serve]' && useradd --create-home omnimamba

USER omnimamba
WORKDIR /home/omnimamba
EXPOSE 8000
HEALTHCHECK --start-period=120s --interval=30s --timeout=5s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["omnimamba"]
CMD ["serve", "--host", "0.0.0.0"]
