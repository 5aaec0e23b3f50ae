"""Names and shapes of each family's weights, as checkpoints, diffusers and LoRAs spell them."""
