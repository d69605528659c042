"""The project and TRL side by side: speed, memory and agreement. See README.md beside this file."""
