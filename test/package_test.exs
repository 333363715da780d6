defmodule VLLM.PackageTest do
  use ExUnit.Case, async: true

  alias VLLM.Shipped

  test "a package from Hex has all that the library runs, and nothing compiled" do
    packed = Shipped.packed()
    assert "python/sitecustomize.py" in Shipped.files()
    assert "priv/python" in packed
    assert Shipped.files() -- packed == []
    refute Enum.any?(packed, &(&1 =~ ~r/\.pyc$|python\/tests/))
  end

  test "the folder that a release copies leads to all of it" do
    for "python/" <> path <- Shipped.files() do
      assert File.regular?(Path.join(VLLM.Python.path(), path)), path
    end

    priv = to_string(:code.priv_dir(:ex_vllm))
    for "priv/" <> path <- Shipped.files(), do: assert(File.exists?(Path.join(priv, path)), path)
  end
end
