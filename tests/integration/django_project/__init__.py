"""A Django project as Celery's documentation shows one; this package is also its only app."""

from tests.integration.django_project.celery import app

__all__ = ["app"]
