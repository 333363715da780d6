defmodule VLLM.Web.DescriptionTest do
  # A sample of what bench/http_fuzz.exs does at length.
  use ExUnit.Case, async: false

  import ExUnit.CaptureIO
  import VLLM.FakeJobs, only: [folders: 1, use_everywhere: 0]

  alias VLLM.HTTPFuzz

  @moduletag :slow
  @moduletag :tmp_dir
  @moduletag timeout: 1_200_000

  setup :folders

  setup do
    schemathesis = HTTPFuzz.schemathesis()
    use_everywhere()
    %{schemathesis: schemathesis}
  end

  for {what, switch} <- [
        {"what is answered at once", "--exclude-path-regex"},
        {"what starts a process", "--include-path-regex"}
      ] do
    test "the admin API is as its description says: #{what}", %{schemathesis: schemathesis} do
      chosen = [unquote(switch), HTTPFuzz.heavy(), "--max-examples", "2", "--seed", "1"]
      {status, said} = with_io(fn -> HTTPFuzz.admin(schemathesis, chosen) end)
      assert status == 0, said
    end
  end
end
