defmodule VLLM.FieldsTest do
  use ExUnit.Case, async: true
  doctest VLLM.Fields

  test "each field is a line of the docs" do
    assert VLLM.Fields.docs(bits: "of each weight", runs?: "whether it runs") ==
             "  * `:bits` - of each weight\n  * `:runs?` - whether it runs"
  end
end
