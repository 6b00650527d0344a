"""What a step costs: time, memory and bytes sent, beside the floor, the plain sum and peers."""
