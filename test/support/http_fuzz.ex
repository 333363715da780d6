defmodule VLLM.HTTPFuzz do
  @moduledoc """
  Has Schemathesis ask the admin API for all that its description allows, and for what it does not; see
  bench/http_fuzz.exs.
  """

  alias VLLM.{FakeJobs, Job, OpenAI, Server}

  @key "sk-fuzz"

  # How many engines and jobs may gather, and how often that is looked at, in ms.
  @most 4
  @interval 500

  # Events, which have no end, are left out; and what the schema allows a model or an option may refuse.
  @fixed ~w(--no-color --exclude-path /api/v1/events --request-timeout 120 --phases coverage,fuzzing) ++
           ~w(--exclude-checks positive_data_acceptance) ++
           ~w(--continue-on-failure --suppress-health-check all --generation-database none -H) ++
           ["Authorization: Bearer #{@key}"]

  @doc "Has engines, jobs and questions use made-up programs, for good."
  def fake do
    {:ok, python} = VLLM.Python.executable()
    System.put_env("EX_VLLM_TEST_PYTHON", python)

    for name <- [:python, :quantize_python],
        do: Application.put_env(:ex_vllm, name, FakeJobs.everywhere())
  end

  @doc """
  Starts a server and has it asked by the program `schemathesis` with these arguments. The result is what that
  has said, and its status.
  """
  @spec run(Path.t(), [String.t()]) :: %{text: String.t(), status: non_neg_integer()}
  def run(schemathesis, arguments) do
    {:ok, server} = Server.start_link(web: true, port: 0, api_keys: [{@key, admin: true}])
    janitor = spawn_link(&tidy_up/0)
    url = server |> Server.url() |> URI.merge("/api/v1/openapi.json") |> to_string()
    arguments = ["run", url | @fixed] ++ arguments

    {text, status} =
      System.cmd(schemathesis, arguments, stderr_to_stdout: true, cd: System.tmp_dir!())

    Process.unlink(janitor)
    Process.exit(janitor, :kill)
    tidy_up(0)
    Process.unlink(server)
    Supervisor.stop(server)
    %{text: text, status: status}
  end

  # Or whoever asks for more and more gets it, until the machine is full.
  defp tidy_up do
    Process.sleep(@interval)
    tidy_up(@most)
    tidy_up()
  end

  defp tidy_up(most) do
    for job <- Enum.drop(Job.list(), most), do: [Job.cancel(job), Job.delete(job)]
    for entry <- Enum.drop(OpenAI.Models.started(), most), do: VLLM.stop(entry.engine)
  end
end
