"""The report: verdicts, exhibits and explanations as text, Markdown and HTML.

Formats what others measured; measures nothing and decides nothing.
"""
