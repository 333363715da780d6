defmodule VLLM.HTTPFuzz do
  @moduledoc """
  Has Schemathesis ask a server for all that its description allows, and for what it does not: the admin API by its
  own, an engine by that of vLLM's API app; and has it get what is almost a request. See bench/http_fuzz.exs.
  """

  alias VLLM.{Exchange, FakeJobs, HTTPBodies, HTTPBytes, JSON, Job, OpenAI, Server}
  alias VLLM.Engine.Call

  @key "sk-fuzz"

  # How many engines and jobs may gather, and how often that is looked at, in ms.
  @most 4
  @interval 500

  @fixed ~w(--no-color --request-timeout 120 --phases coverage,fuzzing --continue-on-failure) ++
           ~w(--suppress-health-check all --generation-database none -H) ++
           ["Authorization: Bearer #{@key}"]

  # How long an answer of an engine may take to go on, in ms.
  @patience 120_000

  # Events, which have no end, are left out; and what the schema allows a model or an option may refuse.
  @admin ~w(--exclude-path /api/v1/events --exclude-checks positive_data_acceptance)

  # vLLM's description says little of its answers; that they are none of a fault is asked of all.
  @engine ~w(--checks not_a_server_error --workers 4)

  @doc "The program, which is in the environment of the tests: where it is before anything is made up."
  @spec schemathesis() :: Path.t()
  def schemathesis do
    {:ok, python} = VLLM.Python.executable()
    Path.join(Path.dirname(python), "schemathesis")
  end

  @doc "The paths of the admin API that start a process at each request."
  def heavy, do: "^/api/v1/(models|quantize/(options|estimate|compare))"

  @doc "Has engines, jobs and questions use made-up programs, for good."
  def fake do
    {:ok, python} = VLLM.Python.executable()
    System.put_env("EX_VLLM_TEST_PYTHON", python)

    for name <- [:python, :quantize_python],
        do: Application.put_env(:ex_vllm, name, FakeJobs.everywhere())
  end

  @doc """
  Starts a server and has its admin API asked by the program `schemathesis` with these arguments, which prints what
  it finds. The result is its status.
  """
  @spec admin(Path.t(), [String.t()]) :: non_neg_integer()
  def admin(schemathesis, arguments) do
    with_server([web: true, api_keys: [{@key, admin: true}]], fn url ->
      janitor = spawn_link(&tidy_up/0)
      status = ask(schemathesis, ["#{url}/api/v1/openapi.json" | @admin] ++ arguments)
      Process.unlink(janitor)
      Process.exit(janitor, :kill)
      tidy_up(0)
      status
    end)
  end

  @doc "The same of the paths that are served of an engine, whose app describes them."
  @spec engine(Path.t(), [String.t()], VLLM.engine()) :: non_neg_integer()
  def engine(schemathesis, arguments, engine) do
    file = Path.join(System.tmp_dir!(), "openapi-#{System.pid()}.json")
    File.write!(file, description(engine))

    with_server([models: [{"fuzzed", engine}], api_keys: [@key], tokenize: true], fn url ->
      status = ask(schemathesis, [file, "--url", url | @engine] ++ arguments)
      File.rm!(file)
      status
    end)
  end

  @doc "Asks an engine that does what `runner` says so many requests whose options have any values; see `VLLM.HTTPBodies.ask/5`."
  @spec bodies(VLLM.engine(), String.t(), pos_integer()) :: {statuses :: map(), faults :: list()}
  def bodies(engine, runner, count) do
    with_server([models: [{"fuzzed", engine}], api_keys: [@key], tokenize: true], fn url ->
      HTTPBodies.ask(URI.parse(url).port, @key, runner, count, @patience)
    end)
  end

  @doc "Sends so many requests that are changed byte by byte, of which none gets to an engine; how often each status came."
  @spec bytes(pos_integer()) :: %{(100..599) => pos_integer()}
  def bytes(count) do
    with_server([models: [{"one", :nobody}, {"another", :nobody}]], fn url ->
      HTTPBytes.ask(URI.parse(url).port, count)
    end)
  end

  defp with_server(options, ask) do
    {:ok, server} = Server.start_link([port: 0] ++ options)
    answer = server |> Server.url() |> String.replace_suffix("/v1", "") |> ask.()
    Process.unlink(server)
    Supervisor.stop(server)
    answer
  end

  # What the app has to say, without what is not served, and with the name of the one model, which nobody would hit upon.
  defp description(engine) do
    asked = %{"method" => "GET", "path" => "/openapi.json", "model" => "fuzzed"}
    call = Call.new(%{timeout: 60_000})
    {:ok, {200, _headers, body}} = Exchange.request(engine, asked, call)
    {:ok, description} = JSON.decode(body)
    {:ok, known} = VLLM.Options.only([models: [engine], tokenize: true], VLLM.Options.openai())
    {:ok, core} = OpenAI.new(known, nil)

    description
    |> Map.update!("paths", &Map.take(&1, OpenAI.paths(core) -- ["/health", "/metrics"]))
    |> update_in(
      ["components", "schemas"],
      &Map.new(&1, fn {name, type} -> {name, named(type)} end)
    )
    |> JSON.encode()
  end

  defp named(%{"properties" => %{"model" => _any}} = type),
    do: put_in(type, ["properties", "model"], %{"type" => "string", "enum" => ["fuzzed"]})

  defp named(type), do: type

  defp ask(schemathesis, arguments) do
    options = [stderr_to_stdout: true, cd: System.tmp_dir!(), into: IO.stream(:stdio, :line)]
    {_printed, status} = System.cmd(schemathesis, ["run" | arguments] ++ @fixed, options)
    status
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
