defmodule VLLM.FakeJobs do
  @moduledoc "Jobs whose steps are made up: test/support/fake_job.py says what they can be told."

  @python Path.expand("fake_job_python", __DIR__)
  @everywhere Path.expand("fake_web_python", __DIR__)

  @doc """
  Gives the tests of a module a data folder of their own in their `tmp_dir`, and a model to quantize:
  for `setup`.
  """
  def folders(%{tmp_dir: folder}) do
    before = Application.get_env(:ex_vllm, :data_dir)
    Application.put_env(:ex_vllm, :data_dir, Path.join(folder, "data"))

    ExUnit.Callbacks.on_exit(fn ->
      for job <- VLLM.Job.list(), do: VLLM.Job.cancel(job)
      Application.put_env(:ex_vllm, :data_dir, before)
    end)

    model = Path.join(folder, "plain")
    File.mkdir_p!(model)
    File.write!(Path.join(model, "config.json"), "{}")
    %{model: model, folder: folder}
  end

  @doc "The Python that is made up for all of them."
  def everywhere, do: @everywhere

  @doc """
  Has engines, jobs and questions that name no Python of their own use made-up ones, for the tests of a
  module: for `setup`.
  """
  def use_everywhere do
    for name <- [:python, :quantize_python] do
      before = Application.get_env(:ex_vllm, name)
      Application.put_env(:ex_vllm, name, @everywhere)
      ExUnit.Callbacks.on_exit(fn -> restore(name, before) end)
    end

    :ok
  end

  defp restore(name, nil), do: Application.delete_env(:ex_vllm, name)
  defp restore(name, value), do: Application.put_env(:ex_vllm, name, value)

  @doc "The options of a job that quantizes with made-up steps."
  def options(to, more \\ []), do: [to: to, quantize_python: @python] ++ worker() ++ more

  @doc "The options of any job with made-up steps."
  def worker, do: [python: @python, env: %{"PYTHONDONTWRITEBYTECODE" => "1"}]

  @doc "Starts one."
  def quantize(model, to, more \\ []), do: VLLM.Job.quantize(model, options(to, more))

  def quantize!(model, to, more \\ []), do: VLLM.Error.bang!(quantize(model, to, more))

  @doc "Starts one that trains the adapter `to`; its data is made up, too."
  def finetune(model, to, more \\ []),
    do: VLLM.Job.finetune(model, [{"One", " two."}], [to: to] ++ worker() ++ more)

  def finetune!(model, to, more \\ []), do: VLLM.Error.bang!(finetune(model, to, more))

  @doc "What is in the folder of a job beside its record and its logs, and drafts of these."
  def left(job), do: File.ls!(VLLM.Data.jobs(job.id)) -- ["job", "log", "log.1"]

  @doc "The models that have a place."
  def models do
    [VLLM.Data.dir(), "models", "*", "*"]
    |> Path.join()
    |> Path.wildcard()
    |> Enum.map(&Path.relative_to(&1, Path.join(VLLM.Data.dir(), "models")))
  end
end
