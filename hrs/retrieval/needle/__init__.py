"""Needle in a haystack: a fact that nobody can guess, hidden in a long text; is it found, and can it be told?"""
