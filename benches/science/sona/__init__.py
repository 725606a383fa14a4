"""What the three loops are worth, measured on people's clicks in a real search task."""
