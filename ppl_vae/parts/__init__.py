"""What a VAE is made of: likelihoods, networks, priors, posteriors, flows, and the table of their words."""
