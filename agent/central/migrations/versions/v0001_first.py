"""The first schema."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from agent.central.tables import Counter, Json, UtcTime

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make all tables."""
    op.create_table(
        "acks",
        sa.Column("site", sa.Text(), nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("stream", sa.Text(), nullable=False),
        sa.Column("since_boot", sa.BigInteger(), nullable=False),
        sa.Column("complete_seq", sa.BigInteger(), nullable=False),
        sa.Column("boot", sa.BigInteger(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("highest_seq", sa.BigInteger(), nullable=False),
        sa.Column("updated_at", UtcTime(), nullable=False),
        sa.PrimaryKeyConstraint("site", "device", "stream", "since_boot"),
    )
    op.create_table(
        "alerts",
        sa.Column("site", sa.Text(), nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("alert", sa.Text(), nullable=False),
        sa.Column("since", UtcTime(), nullable=False),
        sa.Column("cleared_at", UtcTime(), nullable=True),
        sa.Column("severity", sa.Text(), nullable=True),
        sa.Column("message", sa.Text(), nullable=True),
        sa.Column("body", Json, nullable=True),
        sa.PrimaryKeyConstraint("site", "device", "alert"),
    )
    op.create_table(
        "audit",
        sa.Column("site", sa.Text(), nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("boot", sa.BigInteger(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("at", UtcTime(), nullable=False),
        sa.Column("received_at", UtcTime(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("outcome", sa.Text(), nullable=True),
        sa.Column("asked_by", sa.Text(), nullable=True),
        sa.Column("message", sa.Text(), nullable=True),
        sa.Column("body", Json, nullable=False),
        sa.PrimaryKeyConstraint("site", "device", "boot", "seq"),
    )
    op.create_table(
        "cells",
        sa.Column("site", sa.Text(), nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("cell_id", sa.Text(), nullable=False),
        sa.Column("sample", sa.Text(), nullable=False),
        sa.Column("boot", sa.BigInteger(), nullable=True),
        sa.Column("seq", sa.BigInteger(), nullable=True),
        sa.Column("captured_at", UtcTime(), nullable=False),
        sa.Column("class", sa.Text(), nullable=False),
        sa.Column("probability", sa.Double(), nullable=True),
        sa.Column("margin", sa.Double(), nullable=True),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("duplicate_of", sa.Text(), nullable=True),
        sa.Column("x_min_px", sa.Double(), nullable=False),
        sa.Column("y_min_px", sa.Double(), nullable=False),
        sa.Column("x_max_px", sa.Double(), nullable=False),
        sa.Column("y_max_px", sa.Double(), nullable=False),
        sa.Column("slide_x_um", sa.Double(), nullable=True),
        sa.Column("slide_y_um", sa.Double(), nullable=True),
        sa.Column("detector_class", sa.Text(), nullable=False),
        sa.Column("detector_score", sa.Double(), nullable=True),
        sa.Column("probabilities", Json, nullable=False),
        sa.Column("morphology", Json, nullable=True),
        sa.PrimaryKeyConstraint("site", "device", "cell_id"),
    )
    op.create_index("cells_by_field", "cells", ["site", "device", "boot", "seq"], unique=False)
    op.create_index("cells_by_sample", "cells", ["site", "device", "sample", "class"], unique=False)
    op.create_index("cells_by_time", "cells", ["captured_at"], unique=False)
    op.create_table(
        "dead_letters",
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("topic", sa.Text(), nullable=False),
        sa.Column("payload", sa.LargeBinary(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("site", sa.Text(), nullable=True),
        sa.Column("device", sa.Text(), nullable=True),
        sa.Column("stream", sa.Text(), nullable=True),
        sa.Column("boot", sa.BigInteger(), nullable=True),
        sa.Column("seq", sa.BigInteger(), nullable=True),
        sa.Column("first_at", UtcTime(), nullable=False),
        sa.Column("last_at", UtcTime(), nullable=False),
        sa.Column("times", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("digest"),
    )
    op.create_table(
        "devices",
        sa.Column("site", sa.Text(), nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("first_seen_at", UtcTime(), nullable=False),
        sa.Column("last_seen_at", UtcTime(), nullable=False),
        sa.Column("boot", sa.BigInteger(), nullable=True),
        sa.Column("state", sa.Text(), nullable=True),
        sa.Column("state_at", UtcTime(), nullable=True),
        sa.Column("agent", sa.Text(), nullable=True),
        sa.Column("info", Json, nullable=True),
        sa.Column("health", Json, nullable=True),
        sa.Column("health_at", UtcTime(), nullable=True),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("site", "device"),
    )
    op.create_table(
        "differential_shares",
        sa.Column("differential_id", Counter, autoincrement=False, nullable=False),
        sa.Column("class", sa.Text(), nullable=False),
        sa.Column("count", sa.BigInteger(), nullable=False),
        sa.Column("pct", sa.Double(), nullable=True),
        sa.Column("low_pct", sa.Double(), nullable=True),
        sa.Column("high_pct", sa.Double(), nullable=True),
        sa.Column("flag", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("differential_id", "class"),
    )
    op.create_table(
        "differentials",
        sa.Column("differential_id", Counter, autoincrement=True, nullable=False),
        sa.Column("site", sa.Text(), nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("sample", sa.Text(), nullable=False),
        sa.Column("boot", sa.BigInteger(), nullable=True),
        sa.Column("seq", sa.BigInteger(), nullable=True),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("report", sa.Text(), nullable=True),
        sa.Column("at", UtcTime(), nullable=False),
        sa.Column("received_at", UtcTime(), nullable=False),
        sa.Column("leukocytes", sa.BigInteger(), nullable=True),
        sa.Column("body", Json, nullable=False),
        sa.PrimaryKeyConstraint("differential_id"),
        sa.UniqueConstraint("site", "device", "boot", "seq", name="differentials_number"),
    )
    op.create_index("differentials_by_sample", "differentials", ["site", "device", "sample"], unique=False)
    op.create_table(
        "events",
        sa.Column("site", sa.Text(), nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("boot", sa.BigInteger(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("at", UtcTime(), nullable=False),
        sa.Column("received_at", UtcTime(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("severity", sa.Text(), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("detail", Json, nullable=False),
        sa.Column("historical", sa.Boolean(), nullable=False),
        sa.Column("body", Json, nullable=False),
        sa.PrimaryKeyConstraint("site", "device", "boot", "seq"),
    )
    op.create_index("events_by_time", "events", ["at"], unique=False)
    op.create_table(
        "fields",
        sa.Column("site", sa.Text(), nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("boot", sa.BigInteger(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("sample", sa.Text(), nullable=False),
        sa.Column("accession", sa.Text(), nullable=True),
        sa.Column("captured_at", UtcTime(), nullable=False),
        sa.Column("captured_monotonic_ns", sa.BigInteger(), nullable=True),
        sa.Column("received_at", UtcTime(), nullable=False),
        sa.Column("clock_synchronised", sa.Boolean(), nullable=True),
        sa.Column("clock_offset_ms", sa.Double(), nullable=True),
        sa.Column("frame_n", sa.BigInteger(), nullable=True),
        sa.Column("frame_sha256_16", sa.Text(), nullable=True),
        sa.Column("width_px", sa.BigInteger(), nullable=True),
        sa.Column("height_px", sa.BigInteger(), nullable=True),
        sa.Column("um_per_px", sa.Double(), nullable=True),
        sa.Column("stage_x_um", sa.Double(), nullable=True),
        sa.Column("stage_y_um", sa.Double(), nullable=True),
        sa.Column("focus", sa.Double(), nullable=True),
        sa.Column("clipped_pct", sa.Double(), nullable=True),
        sa.Column("total_ms", sa.Double(), nullable=True),
        sa.Column("counts", Json, nullable=False),
        sa.Column("unique_counts", Json, nullable=False),
        sa.Column("duplicates", sa.BigInteger(), nullable=False),
        sa.Column("cell_count", sa.BigInteger(), nullable=False),
        sa.Column("agent", sa.Text(), nullable=True),
        sa.Column("detector", sa.Text(), nullable=True),
        sa.Column("classifier", sa.Text(), nullable=True),
        sa.Column("config_sha256", sa.Text(), nullable=True),
        sa.Column("historical", sa.Boolean(), nullable=False),
        sa.Column("body", Json, nullable=False),
        sa.PrimaryKeyConstraint("site", "device", "boot", "seq"),
    )
    op.create_index("fields_by_sample", "fields", ["site", "device", "sample", "seq"], unique=False)
    op.create_index("fields_by_time", "fields", ["captured_at"], unique=False)
    op.create_table(
        "gaps",
        sa.Column("gap_id", Counter, autoincrement=True, nullable=False),
        sa.Column("site", sa.Text(), nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("stream", sa.Text(), nullable=False),
        sa.Column("since_boot", sa.BigInteger(), nullable=False),
        sa.Column("first_seq", sa.BigInteger(), nullable=False),
        sa.Column("last_seq", sa.BigInteger(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("found_at", UtcTime(), nullable=False),
        sa.Column("asked_at", UtcTime(), nullable=True),
        sa.Column("asks", sa.Integer(), nullable=False),
        sa.Column("closed_at", UtcTime(), nullable=True),
        sa.Column("note", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("gap_id"),
    )
    op.create_index("gaps_by_device", "gaps", ["site", "device", "status"], unique=False)
    op.create_table(
        "received",
        sa.Column("site", sa.Text(), nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("stream", sa.Text(), nullable=False),
        sa.Column("boot", sa.BigInteger(), nullable=False),
        sa.Column("first_seq", sa.BigInteger(), nullable=False),
        sa.Column("last_seq", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("site", "device", "stream", "boot", "first_seq"),
    )
    op.create_table(
        "samples",
        sa.Column("site", sa.Text(), nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("sample", sa.Text(), nullable=False),
        sa.Column("phase", sa.Text(), nullable=True),
        sa.Column("accession", sa.Text(), nullable=True),
        sa.Column("age_band", sa.Text(), nullable=True),
        sa.Column("opened_at", UtcTime(), nullable=True),
        sa.Column("ended_at", UtcTime(), nullable=True),
        sa.Column("end_reason", sa.Text(), nullable=True),
        sa.Column("boot", sa.BigInteger(), nullable=True),
        sa.Column("body", Json, nullable=True),
        sa.Column("updated_at", UtcTime(), nullable=False),
        sa.PrimaryKeyConstraint("site", "device", "sample"),
    )
