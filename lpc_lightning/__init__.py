"""Align language models on preference pairs with Latent Preference Coding (Gong et al., ICML 2025)."""
