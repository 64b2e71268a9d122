"""Claims about models: where six kinds of knowledge live, by layer, head and neuron.

Each module measures one thing, judges what the paper says of it, and gives the tables and figures that show it.
"""
