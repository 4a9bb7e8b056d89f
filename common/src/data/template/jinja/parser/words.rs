//! Looking at the words of a template, and taking them.

use super::super::failure::Result;
use super::super::lexer::{Token, syntax};
use super::Parser;

impl Parser {
    pub(super) fn peek(&self) -> &Token {
        self.tokens
            .get(self.at)
            .map_or(&Token::End, |located| &located.token)
    }

    pub(super) fn line(&self) -> usize {
        let last = self.tokens.len().saturating_sub(1);
        self.tokens
            .get(self.at.min(last))
            .map_or(0, |located| located.line)
    }

    pub(super) fn next(&mut self) -> Token {
        let token = self.peek().clone();
        self.at += 1;
        token
    }

    pub(super) fn name(&mut self) -> Result<String> {
        match self.next() {
            Token::Name(name) => Ok(name),
            found => {
                self.at -= 1;
                Err(self.unexpected(&found, "a name"))
            }
        }
    }

    pub(super) fn unexpected(
        &self,
        found: &Token,
        wanted: &str,
    ) -> Box<super::super::failure::Failure> {
        let found = match found {
            Token::Name(name) => format!("`{name}`"),
            Token::Operator(operator) => format!("`{operator}`"),
            Token::Text(_) => "a string".to_owned(),
            Token::Integer(_) | Token::Float(_) => "a number".to_owned(),
            Token::BlockEnd => "the end of the block (`%}`)".to_owned(),
            Token::VariableEnd => "the end of the expression (`}}`)".to_owned(),
            _ => "the end of the template".to_owned(),
        };
        syntax(format!("expected {wanted}, found {found}"), self.line())
    }

    pub(super) fn expect(&mut self, token: &Token, text: &str) -> Result<()> {
        if self.peek() == token {
            self.at += 1;
            return Ok(());
        }
        Err(self.unexpected(self.peek(), &format!("`{text}`")))
    }

    pub(super) fn end_of_block(&mut self) -> Result<()> {
        self.expect(&Token::BlockEnd, "%}")
    }

    pub(super) fn skip_to_end_of_block(&mut self) -> Result<()> {
        while !matches!(self.peek(), Token::BlockEnd | Token::End) {
            self.at += 1;
        }
        self.end_of_block()
    }

    pub(super) fn expect_operator(&mut self, operator: &'static str) -> Result<()> {
        self.expect(&Token::Operator(operator), operator)
    }

    pub(super) fn expect_name(&mut self, name: &str) -> Result<()> {
        self.expect(&Token::Name(name.to_owned()), name)
    }

    pub(super) fn skip_operator(&mut self, operator: &'static str) -> bool {
        let found = *self.peek() == Token::Operator(operator);
        self.at += usize::from(found);
        found
    }

    pub(super) fn is_name(&self, name: &str) -> bool {
        matches!(self.peek(), Token::Name(found) if found == name)
    }

    pub(super) fn skip_name(&mut self, name: &str) -> bool {
        let found = self.is_name(name);
        self.at += usize::from(found);
        found
    }
}
