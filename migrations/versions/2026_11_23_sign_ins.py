"""Sign-ins: one row for each device that is signed in, with the hash of the refresh token that is good now.

| table | a user (`chatkeep.user_id`) | the worker | the owner |
| --- | --- | --- | --- |
| `sign_in` | the user's own: reads, makes, renews, ends | nothing | everything |

Only `chatkeep_api` has privileges on it.

Revision: sign_ins
Follows: row_level_security
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "sign_ins"
down_revision = "row_level_security"
branch_labels = None
depends_on = None

_USER = "(SELECT nullif(current_setting('chatkeep.user_id', true), '')::bigint)"
_ROLE = "(SELECT current_setting('chatkeep.role', true))"

_GRANT = """
DO $$
BEGIN
    IF to_regrole('chatkeep_api') IS NOT NULL THEN
        GRANT SELECT, INSERT, UPDATE (token_hash, renewals, renewed_at, expires_at), DELETE ON sign_in TO chatkeep_api;
    END IF;
END $$
"""


def upgrade() -> None:
    op.create_table(
        "sign_in",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("user_id", sa.BigInteger(), nullable=False),
        sa.Column("token_hash", sa.String(64), nullable=False),
        sa.Column("renewals", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.Column("renewed_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_sign_in")),
        sa.ForeignKeyConstraint(["user_id"], ["user.id"], name=op.f("fk_sign_in_user_id"), ondelete="CASCADE"),
    )
    op.create_index(op.f("ix_sign_in_user_id_renewed_at"), "sign_in", ["user_id", sa.text("renewed_at DESC")])
    op.execute("ALTER TABLE sign_in ENABLE ROW LEVEL SECURITY")
    op.execute("ALTER TABLE sign_in FORCE ROW LEVEL SECURITY")
    op.execute(f"CREATE POLICY own_sign_ins ON sign_in FOR ALL USING (user_id = {_USER})")
    op.execute(f"CREATE POLICY all_sign_ins ON sign_in FOR ALL USING ({_ROLE} = 'owner')")
    op.execute(_GRANT)


def downgrade() -> None:
    op.drop_table("sign_in")
