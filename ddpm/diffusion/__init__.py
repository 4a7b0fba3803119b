"""The mathematics: UNet, noise and objective, the table of schedulers, averages of the weights."""
