"""Align language models on preference pairs with Latent Preference Coding (Gong et al., ICML 2025)."""

import logging

# Where bitsandbytes is installed, transformers and peft import it, and on some processors it warns that a CPU kernel
# for 4-bit weights is not there. Few would miss it (QLoRA is for GPUs), and every command would begin with the warning.
# Here and not in `cli.set_up_logging`: nothing else of ours runs before those imports.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: not record.getMessage().startswith("Failed to load CPU gemm_4bit_forward")
)
