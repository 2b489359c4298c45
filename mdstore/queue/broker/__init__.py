"""Publish messages, receive them, hold them while tasks work on them, and acknowledge or reject them."""
