"""The rooms behind train.py, evaluate.py, push.py and sample.py; each imports only rooms above it.

errors, config, commands, runfolder, checks, commandline, hub, account, order, cutting, opening,
decoding, sources, datareport, blocks, streaming, images, model, diffusion, ema, pipeline,
pictures, samplers, generation, restoring, prompting, gallery, painting, proof, features, bands,
metrics, memorisation, curve, card, staging, publishing, travel, background, tracking, exam,
evaluation, checkpoint, plan, stopping, budget, stepping, memory, training, rehearsal.
"""
