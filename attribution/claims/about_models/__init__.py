"""What is measured for claims about models: where are six kinds of knowledge stored?

The files of `test_knowledge` state the claims. The data of the paper's tables and figures is here too, as exhibits.
"""
