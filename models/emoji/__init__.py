"""The embedded model's making: data, autoencoder, text tower, denoiser, judge, evaluation, card."""
