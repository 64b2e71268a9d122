"""Claims about models: where do six kinds of knowledge live?

One module for each file of `test_knowledge`; also the data of the paper's tables and figures, as exhibits.
"""
