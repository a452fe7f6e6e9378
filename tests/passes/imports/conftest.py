from exported import dit

__all__ = ["dit"]
