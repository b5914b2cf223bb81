"""Accounts of people whom an outside identity provider vouches for: named by its issuer and subject, without address or password.

An account is one or the other: whoever has the same e-mail address at a provider does not get at the account that was made here with it.
Row-level security: `chatkeep.issuer` and `chatkeep.subject` say whose account a transaction may see or make, as `chatkeep.email` does.

Revision: outside_accounts
Follows: sign_ins
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "outside_accounts"
down_revision = "sign_ins"
branch_labels = None
depends_on = None

_OURS = "email IS NOT NULL AND password_hash IS NOT NULL AND issuer IS NULL AND subject IS NULL"
_OUTSIDE = "email IS NULL AND password_hash IS NULL AND issuer IS NOT NULL AND subject IS NOT NULL"
_ISSUER = "(SELECT nullif(current_setting('chatkeep.issuer', true), ''))"
_SUBJECT = "(SELECT nullif(current_setting('chatkeep.subject', true), ''))"


def upgrade() -> None:
    op.alter_column("user", "email", nullable=True)
    op.alter_column("user", "password_hash", nullable=True)
    op.add_column("user", sa.Column("issuer", sa.Text(), nullable=True))
    op.add_column("user", sa.Column("subject", sa.Text(), nullable=True))
    op.create_unique_constraint(op.f("uq_user_issuer_subject"), "user", ["issuer", "subject"])
    op.create_check_constraint(op.f("ck_user_ours_or_outside"), "user", f"({_OURS}) OR ({_OUTSIDE})")
    op.create_check_constraint(op.f("ck_user_subject_length"), "user", "char_length(issuer) <= 500 AND char_length(subject) <= 255")
    op.execute(f'CREATE POLICY outside_account ON "user" FOR SELECT USING (issuer = {_ISSUER} AND subject = {_SUBJECT})')
    op.execute(f'CREATE POLICY new_outside_account ON "user" FOR INSERT WITH CHECK (issuer = {_ISSUER} AND subject = {_SUBJECT})')


def downgrade() -> None:
    op.execute('DROP POLICY new_outside_account ON "user"')
    op.execute('DROP POLICY outside_account ON "user"')
    op.drop_constraint(op.f("ck_user_subject_length"), "user")
    op.drop_constraint(op.f("ck_user_ours_or_outside"), "user")
    op.drop_constraint(op.f("uq_user_issuer_subject"), "user")
    op.drop_column("user", "subject")
    op.drop_column("user", "issuer")
    op.alter_column("user", "password_hash", nullable=False)
    op.alter_column("user", "email", nullable=False)
