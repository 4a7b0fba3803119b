"""The digits' feature network as an extractor of torch-fidelity; tests/evaluation uses it too."""

import torch
import torch_fidelity


def register_digits(network: torch.nn.Module) -> None:
    """Make `network` ([B, C, H, W] uint8 -> [B, 64]) known to torch-fidelity as "digits"."""

    class Digits(torch_fidelity.FeatureExtractorBase):
        def __init__(self, name, features_list, **_):
            super().__init__(name, features_list)
            self.network = network

        @staticmethod
        def get_provided_features_list():
            return ("64",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "64"

        @staticmethod
        def can_be_compiled():
            return False

        def forward(self, pixels):
            return (self.network(pixels),)

    torch_fidelity.register_feature_extractor("digits", Digits)
