"""The rooms behind train.py, push.py and sample.py; each imports only rooms above it.

errors, config, runfolder, commandline, hub, account, images, order, model, diffusion, ema,
pipeline, proof, curve, card, staging, publishing, travel, background, tracking, checkpoint,
stopping, plan, training.
"""
