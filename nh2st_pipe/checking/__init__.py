"""Slides looked at before the GPU is booked: what embed would do with them, what is unlikely, what to correct."""
