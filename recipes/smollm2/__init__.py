"""SmolLM2-135M-Instruct learns to call a calculator; README.md has the commands."""
