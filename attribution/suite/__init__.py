"""The claims about attribution methods: what each says, how it is measured, and what it is judged by.

Each function measures one claim on one model with one method and returns its verdict. The tests in
``test_faithfulness`` call them, one claim each.
"""
