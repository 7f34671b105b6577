"""The search recipe with a real language model of 135 M parameters, on a laptop."""
