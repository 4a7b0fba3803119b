"""The rooms behind train.py, evaluate.py, push.py and sample.py; each imports only rooms above it.

errors, devices, config, commands, runfolder, checks, commandline, hub, account, order, cutting,
opening, decoding, sources, datareport, blocks, streaming, images, model, diffusion, ema, profiles,
tracks, pipeline, pictures, samplers, menu, generation, restoring, prompting, gallery, painting,
proof, lengths, features, bands, metrics, memorisation, curve, tradeoff, lengthcurve, card, staging,
publishing, travel, background, tracking, reference, exam, evaluation, contest, scoring, checkpoint,
plan, stopping, budget, stepping, memory, remarks, best, watching, training, rehearsal.
"""
