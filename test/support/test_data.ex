defmodule VLLM.TestData do
  @moduledoc """
  The data folder of this run of the tests: what they make and name is not among the models of
  whoever runs them, nor are those among theirs.
  """

  def use, do: Application.put_env(:ex_vllm, :data_dir, path())

  def remove, do: File.rm_rf!(path())

  defp path, do: Path.join(System.tmp_dir!(), "ex_vllm-data-#{System.pid()}")
end
