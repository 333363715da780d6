defmodule VLLM.TestPython do
  @moduledoc "The Python interpreter that the tests run reference programs with."

  @doc "The interpreter of the virtual environment that the set-up made."
  @spec executable!() :: Path.t()
  def executable! do
    case VLLM.Python.executable() do
      {:ok, python} -> python
      {:error, error} -> raise error
    end
  end
end
