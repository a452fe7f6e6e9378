from exported import dit, unet

__all__ = ["dit", "unet"]
