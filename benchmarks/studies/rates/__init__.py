"""Does one learning rate suit every kind of path, at every width and rank?"""
