"""What several objectives share: the contract, levels, the discriminator, losses over pairs."""
