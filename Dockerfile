# docker build -t you/ddpm . && docker run --gpus all you/ddpm accelerate launch train.py
FROM python:3.12-slim

WORKDIR /ddpm
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt
COPY . .
