"""The rooms behind train.py, push.py and sample.py; each imports only rooms above it.

errors, config, runfolder, commandline, hub, images, order, model, diffusion, ema, pipeline,
pictures, samplers, generation, restoring, prompting, gallery, painting, tracking, checkpoint,
stopping, plan, training, card, publishing.
"""
