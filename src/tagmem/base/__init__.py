"""Vocabulary that every layer shares; standard library only, so that applications import it
quickly.
"""
