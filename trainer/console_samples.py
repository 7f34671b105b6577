def sample_lines(sample, width):
    return [str(sample["messages"][-1]["content"])[:width] + f"  reward {sample['reward']}"]
