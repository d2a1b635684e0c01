"""Leaks: patients, copies and look-alikes across splits and stores."""
