"""The Gymnasium environments; made with ``gymnasium.make`` after ``import hiedit_env``.

``LifelongEdit``, ``LayerSelection``, ``StepSize`` and ``Planted`` are thin: spaces and
documentation. What they share is in ``base``, the course of one stream in ``episode``, the
observation in ``observations``, pictures in ``rendering``. ``vector`` runs N episodes on one
resident model.
"""
