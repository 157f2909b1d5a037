"""Saves and loads by several processes: how they meet, agree, exchange and decide."""
