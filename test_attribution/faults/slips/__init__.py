"""Slips that an author of the package could make, by subject: one module for each, one fault for each slip."""
