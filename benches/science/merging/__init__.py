"""Two adapters trained apart on two domains: what each way of merging them keeps of both."""
